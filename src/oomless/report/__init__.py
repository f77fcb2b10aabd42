"""What a run did and what a plan says, for people."""
