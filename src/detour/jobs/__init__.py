"""The job queue: a store on disk, a worker that starts jobs, a supervisor beside each of them (docs/queue.md)."""
