"""Who gets which address: pure allocation, no input or output."""
