"""Many replicas in one job: who makes which sample, and that no rank waits forever."""
