"""The sentences: what follows what, and the command line that says them."""
