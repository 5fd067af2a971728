"""What a linearisation gives: the flow, its weight sites, readouts of its states, metrics."""
