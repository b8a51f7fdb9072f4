"""Images and weights over HTTP, for machines that do not share a file system with the run.

`server` answers for what lies in the run's folder; `client` asks it; `cache` keeps the images that a reader fetched.
"""
