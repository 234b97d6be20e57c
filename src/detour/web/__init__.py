"""The web UI: pages over the queue in a folder, and the datasets beside it. Jobs go on when it is closed."""
