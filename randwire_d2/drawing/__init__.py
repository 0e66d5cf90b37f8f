"""Every picture: wirings, networks, curves, detections. Nothing here reads a run's folder."""
