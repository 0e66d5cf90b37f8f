"""Every picture: wirings, training curves, detections. Nothing here reads the folder of a run."""
