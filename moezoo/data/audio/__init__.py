"""Recorded and generated sound: reading, filterbank features, data sets."""
