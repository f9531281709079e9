"""The gRPC edge: certificates, server, channel, authority, errors."""
