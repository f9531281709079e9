"""What is installed at sites beside the services themselves."""
