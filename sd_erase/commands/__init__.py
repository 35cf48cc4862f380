"""Commands of the command line by what they are about; `cli` adds them to its group."""
