"""Training: settings, network, objectives, data, and what a run writes."""
