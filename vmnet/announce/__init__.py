"""What is sent after a machine has moved, and when. Pure: frames and times are values."""
