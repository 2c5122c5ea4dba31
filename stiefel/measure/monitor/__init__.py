"""What happens in a user's own training loop, as it happens."""
