"""Ray Serve applications over dataeff artifacts."""
