{{/*
How pods are replaced: a new one first where there is room for it; with accelerators an old one
first, as there seldom is a spare one. Takes the values of a component.
*/}}
{{- define "kleash.strategy" -}}
{{- $replicas := ternary (int (.autoscaling).minReplicas) (int (default 1 .replicas)) (eq (.autoscaling).enabled true) -}}
{{- $hasDevices := or (gt (int .gpu.count) 0) (gt (len .resourceClaims) 0) -}}
{{- $isChosen := not (and (kindIs "invalid" .strategy.maxSurge) (kindIs "invalid" .strategy.maxUnavailable)) -}}
{{- $type := ternary "Recreate" "RollingUpdate" (and $hasDevices (le $replicas 1) (not $isChosen)) -}}
{{- $type = default $type .strategy.type -}}
type: {{ $type }}
{{- if eq $type "RollingUpdate" }}
rollingUpdate:
  maxSurge: {{ ternary (ternary 0 1 $hasDevices) .strategy.maxSurge (kindIs "invalid" .strategy.maxSurge) }}
  maxUnavailable: {{ ternary (ternary 1 0 $hasDevices) .strategy.maxUnavailable (kindIs "invalid" .strategy.maxUnavailable) }}
{{- end }}
{{- end -}}

{{/* Seconds for a pod to get its model, to start and to become ready, with ten minutes to spare. Takes root, workload. */}}
{{- define "kleash.progressDeadline" -}}
{{- $startup := .root.Values.probes.startup -}}
{{- $seconds := add 600 (mul (int $startup.periodSeconds) (int $startup.failureThreshold)) -}}
{{- range .workload.services -}}
{{- $seconds = add $seconds (int (index $.root.Values .).model.waitSeconds) -}}
{{- end -}}
{{- $seconds -}}
{{- end -}}
