"""What the problems of this folder share."""
