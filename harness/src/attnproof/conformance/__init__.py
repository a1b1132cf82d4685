"""What is checked, one chapter per property."""
