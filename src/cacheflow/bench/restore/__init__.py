"""One prefix restored alone, under every policy."""
