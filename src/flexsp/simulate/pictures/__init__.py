"""Pictures and text of profiles, lengths, plans and simulations. matplotlib is imported where a picture is drawn."""
