"""The engine: a rule for one parameter, lifted to trees and groups."""
