"""Solved ODEs as recurrences of Runge-Kutta steps, and their sensitivities as ODEs of their own."""
