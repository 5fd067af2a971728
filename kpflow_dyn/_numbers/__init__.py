"""What operators are asked for: scalars with their errors, spectra and modes, reductions to some axes."""
