"""What releases and CI need, and neither a user nor a benchmark does."""
