"""Everything that needs torch: trace a step, evaluate it on rows, sweep its tangent."""
