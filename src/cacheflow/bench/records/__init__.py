"""Every record of every suite, one line of a ``.jsonl`` file each; tables and charts read nothing else."""
