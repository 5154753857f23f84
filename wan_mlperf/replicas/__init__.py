"""Many replicas in one job: which replica makes which sample, and how no rank waits forever."""
