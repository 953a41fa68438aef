"""Phantoms and simulated scans; networks and their training come with the learned methods."""
