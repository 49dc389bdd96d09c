"""The fault suite: what breaks an ordinary process, and what this one promises then."""
