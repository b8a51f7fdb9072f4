"""`pointillist store`: what lies in a run's image store, whether it is intact, what can go, and runs as archives."""
