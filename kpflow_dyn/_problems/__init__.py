"""Problems, their solutions, and what both hold: inputs, parameters, measures, the steps of a solver."""
