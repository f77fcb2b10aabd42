"""What an out-of-memory error says, what asked for the memory, what held the rest, and what would cure it."""
