"""The activity of routers, as a terminal shows it: what they tell, read once or followed, and put into words."""
