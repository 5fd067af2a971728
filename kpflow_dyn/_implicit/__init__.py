"""Networks, fixed points and free forms, F(S, theta; x) = 0: how they are solved and linearised."""
