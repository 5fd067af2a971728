"""Equations that are solved by steps of our own on a grid of times: with noise, and with delays."""
