"""Job in, bundle out: candidates measured in their deployed form, the menu chosen and assembled."""
