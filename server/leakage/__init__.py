"""What the hops give away: segments and their draws counted, canaries attacked, edges closed."""
