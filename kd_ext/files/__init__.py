"""What is on a disk, and what may be believed of it."""
