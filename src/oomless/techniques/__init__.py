"""One file for each way to spend less memory, each applied to the one model it is given."""
