"""The nursery: one process a node from which daemons are forked whole, so that they begin quickly and share their memory."""
