{{/* Which nodes a pod may run on. */}}

{{/*
"true" when a pod must run where the others run that mount the release's claim: a ReadWriteOnce
volume is attached to one node. Takes root, component.
*/}}
{{- define "kleash.needsSameNode" -}}
{{- $modes := .root.Values.runs.accessModes -}}
{{- if and (include "kleash.usesRuns" .) (not (has "ReadWriteMany" $modes)) }}true{{ end -}}
{{- end -}}

{{/* Label of the pods that mount the claim; releases that share one go to one node, too. */}}
{{- define "kleash.claimLabel" -}}
{{- $claim := include "kleash.runsClaim" . -}}
{{- ternary (sha256sum $claim | trunc 16) $claim (gt (len $claim) 63) -}}
{{- end -}}

{{/* Keys of a pod's spec. Takes root, component, key. */}}
{{- define "kleash.scheduling" -}}
{{- $root := .root.Values -}}
{{- $values := index $root .key -}}
{{- $spec := dict -}}
{{- with merge dict $values.nodeSelector $root.nodeSelector }}{{ $_ := set $spec "nodeSelector" . }}{{ end -}}
{{- with concat $root.tolerations $values.tolerations }}{{ $_ := set $spec "tolerations" . }}{{ end -}}
{{- with default $root.priorityClassName $values.priorityClassName }}{{ $_ := set $spec "priorityClassName" . }}{{ end -}}
{{- with ($values.gpu).runtimeClassName }}{{ $_ := set $spec "runtimeClassName" . }}{{ end -}}
{{- $affinity := deepCopy (default dict $values.affinity) -}}
{{- if include "kleash.needsSameNode" . -}}
{{- /* The pods carry the label that the rule asks for: the first one satisfies it by itself. */ -}}
{{- $labels := dict "kleash.dev/claim" (include "kleash.claimLabel" .root) -}}
{{- $term := dict "topologyKey" "kubernetes.io/hostname" "labelSelector" (dict "matchLabels" $labels) -}}
{{- $pods := default dict $affinity.podAffinity -}}
{{- $terms := default list $pods.requiredDuringSchedulingIgnoredDuringExecution -}}
{{- $_ := set $pods "requiredDuringSchedulingIgnoredDuringExecution" (append $terms $term) -}}
{{- $_ := set $affinity "podAffinity" $pods -}}
{{- end -}}
{{- with $affinity }}{{ $_ := set $spec "affinity" . }}{{ end -}}
{{- $constraints := list -}}
{{- range $values.topologySpreadConstraints -}}
{{- $constraint := deepCopy . -}}
{{- if not .labelSelector -}}
{{- $_ := set $constraint "labelSelector" (dict "matchLabels" (include "kleash.selectorLabels" $ | fromYaml)) -}}
{{- end -}}
{{- $constraints = append $constraints $constraint -}}
{{- end -}}
{{- with $constraints }}{{ $_ := set $spec "topologySpreadConstraints" . }}{{ end -}}
{{- with $spec }}{{ toYaml . }}{{ end -}}
{{- end -}}
