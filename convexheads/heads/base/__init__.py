"""What all heads have in common."""
