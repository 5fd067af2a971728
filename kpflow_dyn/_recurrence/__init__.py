"""The one linear recurrence d_t = A_t d_{t-1} + B_t V_t dtheta that steps of models give, and the flows made of it."""
