"""The live executor: threads that drive one restoration over two ports. Knows no engine and no store."""
