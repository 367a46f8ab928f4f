"""The commands and what they are made of: verification, audit, and what a report says. The layer imports none of it."""
