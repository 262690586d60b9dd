"""Architecture search: spaces of networks, how they are searched, and what a network costs before it is trained."""
