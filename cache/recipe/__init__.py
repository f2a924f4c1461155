"""Recipes: named, versioned, pure chains of ops, and the digest that tells one from another."""
