"""SQLite with fsync, the event log, and blobs by digest."""
