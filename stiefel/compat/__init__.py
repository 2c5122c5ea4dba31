"""What torch and geoopt do not promise: private names and classes, each behind a name that says what it asks."""
