"""The one-machine cluster. It imports the product; the product never imports it."""
