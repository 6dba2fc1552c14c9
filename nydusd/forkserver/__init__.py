"""The fork server: where the daemon's other processes come from, with what they need loaded already."""
