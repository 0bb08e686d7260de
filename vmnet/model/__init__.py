"""Values every layer shares: networks, endpoints, migrations, claims and names. No input or output happens here."""
