"""Races: the protocol's steps, interleaved with vCPUs, other software and failures in every order there is."""
